"""Names of the operations, shared by the client, the server and the exporter.

A program is an operation or a variant of one. Its name is the operation, followed by a colon and the
variant if there is one: `sample`, `sample:inpaint`.
"""

OPERATIONS = ("sample", "reconstruct", "score", "energy", "encode", "decode", "classify")


def program_name(operation: str, variant: str = "") -> str:
    """Return the name of a program.

    >>> program_name("sample", "inpaint")
    'sample:inpaint'
    """
    return f"{operation}:{variant}" if variant else operation


def parse_program_name(name: str) -> tuple[str, str]:
    """Return the operation and the variant of a program's name; the default variant is "".

    >>> parse_program_name("sample:inpaint")
    ('sample', 'inpaint')
    """
    operation, _, variant = name.partition(":")
    return operation, variant
