"""Check a JSON object against one of the schemas beside this file.

The schemas are ordinary JSON Schema (draft 7), published for other programs; this reads the part of the language
that they use, so that the board needs no further package."""
import json
import os
import re

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def load(name):
    """The schema `name` ('contract' or 'result') as a dict."""
    with open(os.path.join(os.path.dirname(__file__), name + ".schema.json"), encoding="utf-8") as handle:
        return json.load(handle)


def violations(value, schema, where="$", definitions=None):
    """List of lines 'where: what is wrong', empty when `value` fits `schema`. definitions: of the whole schema."""
    definitions = definitions or schema.get("definitions", {})
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return ["%s: is %s, expected %s" % (where, json.dumps(value)[:60], " or ".join(kinds))]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append("%s: is %s, expected one of %s" % (where, json.dumps(value)[:60], json.dumps(schema["enum"])))
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        found.append("%s: is %r, expected to match %s" % (where, value[:60], schema["pattern"]))
    if _is(value, "number") and value < schema.get("minimum", value):
        found.append("%s: is %r, expected at least %r" % (where, value, schema["minimum"]))
    if _is(value, "number") and value > schema.get("maximum", value):
        found.append("%s: is %r, expected at most %r" % (where, value, schema["maximum"]))
    if isinstance(value, dict):
        for key in schema.get("required", []):
            if key not in value:
                found.append("%s: lacks %r" % (where, key))
        for key, part in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            if inner is False:
                found.append("%s: unknown key %r" % (where, key))
            elif isinstance(inner, dict):
                found += violations(part, inner, "%s.%s" % (where, key), definitions)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append("%s: has %d items, expected %s to %s" % (
                where, len(value), schema.get("minItems", 0), schema.get("maxItems", "any number")))
        for index, part in enumerate(value):
            found += violations(part, schema.get("items", {}), "%s[%d]" % (where, index), definitions)
    return found


def _is(value, kind):
    if kind in ("number", "integer"):
        return isinstance(value, (int, float) if kind == "number" else int) and not isinstance(value, bool)
    return isinstance(value, TYPES[kind])
