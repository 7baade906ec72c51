"""Methods that keep fewer keys and values of a language model's sequence, and let go of the others' memory."""
