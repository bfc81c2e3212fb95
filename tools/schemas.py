"""Write the JSON Schemas that effc publishes, or check that they are what the code says.

python tools/schemas.py [--check]
"""

import json
import sys
from pathlib import Path

from effc import package, recipe

FOLDER = Path(__file__).resolve().parent.parent / "effc" / "schema"


def main(check: bool) -> int:
    stale = 0
    for name, schema in (("recipe", recipe.schema()), ("manifest", package.schema())):
        file = FOLDER / f"{name}.json"
        text = json.dumps(schema, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{file} is not what the code says; run `make schema`")
            stale = 1
            continue
        FOLDER.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}")
    return stale


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
