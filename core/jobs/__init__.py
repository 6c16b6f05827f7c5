"""The life of a job: submitted, planned, claimed, run, finished."""
