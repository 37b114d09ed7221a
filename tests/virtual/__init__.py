"""A whole service in one process and in virtual time: the product's own loops, on links of which a test decides."""
