"""Plumbing shared by the three stages. Nothing here knows a hyperparameter of EVOR or imports a script."""
