"""Stage report: what a run found, for a person: report.html and the model card, from the run's files alone.

`table`, `names` and `limits` need neither a plotting library nor templates: the terminal shows their rows too.
"""
