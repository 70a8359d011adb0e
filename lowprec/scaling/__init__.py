"""Scaling laws: from a table of runs to constants with error bars, and to what the table cannot say."""

from lowprec.scaling import laws
from lowprec.scaling.fit import Fit, fit
from lowprec.scaling.law import Law, Parameter, Published, Symbol

__all__ = ["Fit", "Law", "Parameter", "Published", "Symbol", "fit", "laws"]
