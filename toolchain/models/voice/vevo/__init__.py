"""Vevo's networks: two tokenizers of speech, a decoder of content-style tokens, a flow to mel frames, a vocoder."""
