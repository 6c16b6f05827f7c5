"""How `evaluate` judges over each format of model: one file each."""
