"""Columns and constants that many laws share."""

from lowprec.scaling.law import Parameter, Symbol

N = Symbol("N", "parameters; all or without embeddings, but the same for every row", "parameters")
D = Symbol("D", "training tokens", "tokens")
BLOCK = Symbol("block", "elements that share a scale; 1 where nothing is quantized", "elements", 1.0, strict=False)


def coefficient(name: str, about: str, exponent: str, column: str) -> Parameter:
    """The factor c of c · column^-exponent, in nats at the middle of the table."""
    return Parameter(name, about, (0.03, 10.0), (1e-9, 1e6), centre=((exponent, column, 1),))


def exponent(name: str, about: str, start: tuple[float, float] = (0.1, 1.0)) -> Parameter:
    """An exponent, positive."""
    return Parameter(name, about, start, (1e-3, 4.0), log=False)


A = coefficient("A", "coefficient of the parameters", "alpha", "N")
B = coefficient("B", "coefficient of the data", "beta", "D")
E = Parameter("E", "irreducible loss, nats per token", (0.1, 4.0), (1e-8, 1e3))
ALPHA = exponent("alpha", "exponent of the parameters")
BETA = exponent("beta", "exponent of the data")
