"""Distillation: fit a federated model, ask its teacher, train and judge its students."""
