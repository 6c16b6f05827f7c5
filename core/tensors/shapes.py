"""The one legend of axis letters.

B  batch of queries          Q  all queries of a set      n  training rows
d  width of an embedding     C  clusters                  k  kept neighbours
E  entries of a sparse mix   m  planes of a rotation      N  target rows searched

Row convention everywhere: a query is a row, and a rotation acts as ``y = q @ W``.
"""
