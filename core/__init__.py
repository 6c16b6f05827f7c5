"""What Stillroom is: specs, jobs, kinds and algorithms. Imports neither api nor workers."""
