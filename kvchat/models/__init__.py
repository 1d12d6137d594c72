"""Model cards, names of models, and downloads. Imports no torch."""
