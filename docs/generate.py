"""Write the generated parts of docs/: the JSON schemas of the manifest and of a calibration's metadata."""

import json
from pathlib import Path

from fp8pack.checkpoint.calibration_file import CalibrationEntry
from fp8pack.checkpoint.manifest_schema import Manifest

SCHEMAS = {"manifest.schema.json": Manifest, "calibration.schema.json": CalibrationEntry}


def schema_text(name: str) -> str:
    """Return the text of a schema file."""
    return json.dumps(SCHEMAS[name].model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        Path(__file__).with_name(name).write_text(schema_text(name))
