"""Whole numbers and bytes <-> fewer bytes, in NumPy and the standard library; nothing here knows of models.

`codes` packs numbers of one width. `entropy` codes a weight's numbers in as many bytes as their distribution allows:
`code_fit` chooses among the shipped `code_tables`, `vectors` says what was chosen, `numbers` codes each number by a
table of its own with `rans` and `escapes`. `double_array` and `compression` are for what is not numbers. It may use
`errors`.
"""
