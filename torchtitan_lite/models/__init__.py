"""Model families, a folder each, and the table that names them."""
