"""Other people's harnesses, with models that have a recipe on. Nothing here is imported unless they ask for it."""
