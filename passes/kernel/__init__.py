"""What all passes stand on: looking into models, calibrating, cutting, rounding, wrapping; it imports no family."""
