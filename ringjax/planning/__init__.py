"""Plans before anything runs: facts of hardware, what each strategy costs, and how long a context fits."""

from .capacity import MODELS as MODELS, Capacity as Capacity, context as context
from .costs import Prediction as Prediction, predict as predict
from .hardware import (
    HARDWARE as HARDWARE,
    Hardware as Hardware,
    Overhead as Overhead,
    get_hardware as get_hardware,
)
from .plan import Plan as Plan, plan as plan
from .wire import Transfer as Transfer, transfers as transfers
from .workload import Choice as Choice, Workload as Workload
