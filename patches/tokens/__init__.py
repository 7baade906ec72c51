"""Methods that attend among fewer tokens: alike ones are merged, and their results copied back."""
