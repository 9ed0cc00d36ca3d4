"""Low-rank factorization: weights as products of thin matrices."""

from hfshrink.factorization.factors import decompose, low_rank_factors
from hfshrink.factorization.perturbations import perturbation
from hfshrink.factorization.run import factorize
from hfshrink.factorization.tails import factor_errors

__all__ = ["decompose", "factor_errors", "factorize", "low_rank_factors", "perturbation"]
