"""Settings that were written for other tools, read into recipes of effc.

found = run.migrate(Path("ort_config.json"), model="MODEL_DIR")
found.text is the recipe, found.notes what became of every key
"""
