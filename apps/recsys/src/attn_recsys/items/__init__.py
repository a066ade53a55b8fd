"""Ranking items for users: interactions, knowledge graphs, and what is made of them."""
