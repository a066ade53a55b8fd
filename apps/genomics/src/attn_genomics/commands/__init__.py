"""The further commands of `genomics`."""
