"""How each sort of job runs: one file each. Read echo.py first."""
