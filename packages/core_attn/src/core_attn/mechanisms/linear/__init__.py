"""Mechanisms linear in the number of tokens: the products with the keys are summed before the queries read them."""
