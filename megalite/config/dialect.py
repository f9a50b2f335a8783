"""The YAML that megalite reads and writes: scalars by the core schema of version 1.2, no key twice.

YAML 1.1, which PyYAML speaks by itself, reads `1e-4` as text, `on` as true and `1:30` as 90.
"""

import re
from typing import Any

import yaml

from megalite.config.section import ConfigError

_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"'{key.value}' is stated twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version would read as something else."""


_Loader.yaml_implicit_resolvers = {}  # none of version 1.1
for _name, _pattern in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)


def read_yaml(text: str, where: str) -> Any:
    """The value of one YAML document. Raises ConfigError, with `where` and the line, if it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back to an equal value, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)  # in ASCII: PyYAML loses U+0085 otherwise
