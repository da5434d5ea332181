"""The whole way from one recipe, in one run folder (`mpq run`).

`read` turns a recipe file into the schema of `mpq.config`, `contradictions` has the faults that no single key shows,
`stages` says what each stage does and depends on, `run` does them, `record` is what became of them. It may use every
package but the command line.
"""
