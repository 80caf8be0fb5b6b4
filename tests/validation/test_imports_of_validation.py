import subprocess
import sys

CODE = """
import importlib, pkgutil, sys
from enginewright import validation
names = [found.name for found in pkgutil.walk_packages(validation.__path__, "enginewright.validation.")]
for name in names:
    importlib.import_module(name)
rooms = {f"enginewright.{room}" for room in ("passes", "targets", "reports")}
print(len(names), sorted(sys.modules.keys() & {"torch", "onnx", "onnxruntime", *rooms}))
"""


def test_the_whole_room_loads_no_torch_and_no_other_room():
    said = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    count, loaded = said.split(maxsplit=1)
    assert int(count) > 15
    assert loaded.strip() == "[]"
