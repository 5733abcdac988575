"""The recipes that travel with the package, and how a recipe file becomes tables and a sweep."""
