"""The task of survival: when an event comes, from tables of genes and encoded slides."""
