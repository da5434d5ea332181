"""The whole way from one recipe, in one run folder (`mpq run`).

`read` turns a recipe file into the schema of `mpq.config`, `contradictions` has the faults that no single key shows,
`checks` those that only the data show. `stages` says what each stage does and depends on, `setting` what they share,
`figures` what they tell. `run` does them, `aside` keeps what they replace, `record` is what became of them. It may use
every package but the command line.
"""
