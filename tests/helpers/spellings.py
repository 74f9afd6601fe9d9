"""Options of a command line, which may be spelled with dashes or with underscores."""


def options_of(parser) -> list:
    return [action for action in parser._actions if action.dest != "help" and action.option_strings]


def check_both_spellings(parser, action, required: tuple = ()) -> None:
    value = action.choices[0] if isinstance(action.choices, tuple | list) else "1"
    for name in action.option_strings:
        assert "-" not in name.lstrip("-")
        parts = [] if action.nargs == 0 else [value]
        parsed = [
            parser.parse_args([*required, f"--{spelling}", *parts])
            for spelling in (name.lstrip("-"), name.lstrip("-").replace("_", "-"))
        ]
        assert vars(parsed[0]) == vars(parsed[1]) and getattr(parsed[0], action.dest) is not None, name
