"""What a run says: the record and its renderings."""
