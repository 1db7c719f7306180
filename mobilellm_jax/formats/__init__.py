"""Import and export of the weights of other libraries."""
