"""`ringjax bench`: measurements beside peers, in one run."""

from .command import Bench as Bench
