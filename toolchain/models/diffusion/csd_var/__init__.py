"""CSD-VAR: content and style of one picture apart, by a transformer that draws scale after scale; and its networks."""
