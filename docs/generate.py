"""Write the generated parts of docs/: the manifest's JSON schema."""

import json
from pathlib import Path

from fp8pack.checkpoint.manifest_schema import Manifest

SCHEMA = Path(__file__).with_name("manifest.schema.json")


def schema_text() -> str:
    """Return the JSON schema of fp8pack.json."""
    return json.dumps(Manifest.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
