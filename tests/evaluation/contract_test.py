"""Tests that the Python client's arguments and the evaluation's settings are those of attention.proto."""

import ast
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import contract
import settings

OPTIONS = Path(__file__).resolve().parents[2] / "client" / "python" / "prefilld" / "options.py"


class PythonClient(unittest.TestCase):
    """Reads the client's source instead of importing it, because it needs packages that may not be here."""

    @classmethod
    def setUpClass(cls):
        tree = ast.parse(OPTIONS.read_text())
        attention = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Attention")
        cls.fields = {
            node.target.id: (ast.unparse(node.annotation), ast.unparse(node.value))
            for node in attention.body
            if isinstance(node, ast.AnnAssign)
        }

    def test_has_an_argument_for_every_field_absent_by_default(self):
        expected = {"policy": "str", **{name: kind.__name__ for name, kind in contract.thresholds().items()}}
        self.assertEqual(self.fields, {name: (f"{kind} | None", "None") for name, kind in expected.items()})


class Settings(unittest.TestCase):
    def test_take_every_policy_and_every_threshold(self):
        self.assertIn("share", settings.POLICIES)
        for policy in contract.policies():
            self.assertEqual(settings.parse(policy), [settings.Setting(policy)])
        values = {float: "0.5", int: "7", bool: "false"}
        for name, kind in contract.thresholds().items():
            if name == "recall_audit_rows":  # asked for beside the setting, by --recall_audit_rows
                with self.assertRaisesRegex(ValueError, "threshold 'recall_audit_rows' unknown"):
                    settings.parse(f"share:{name}=7")
                continue
            (setting,) = settings.parse(f"share:{name}={values[kind]}")
            self.assertEqual(setting.fields(), {"policy": "share", name: {float: 0.5, int: 7, bool: False}[kind]})

    def test_refuse_what_the_contract_does_not_have(self):
        with self.assertRaisesRegex(ValueError, "policy 'fast' unknown; one of dense, "):
            settings.parse("fast")
        with self.assertRaisesRegex(ValueError, "threshold 'gama' unknown; one of gamma, vertical_slash_gamma, "):
            settings.parse("share:gama=1")
        with self.assertRaisesRegex(ValueError, "same_layer_sharing: 'no' is not a flag"):
            settings.parse("share:same_layer_sharing=no")


if __name__ == "__main__":
    unittest.main()
