"""Block-sparse methods: each reads some key blocks exactly and drops or pools the rest."""
