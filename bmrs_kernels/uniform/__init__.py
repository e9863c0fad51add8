"""The uniform numbers that noise is made from: the counter-based generator Philox4x32-10."""
