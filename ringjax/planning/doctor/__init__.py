"""Whether attention on the devices at hand is right, and as fast as was to be expected."""

from .base import Finding as Finding, Verdict as Verdict
from .examination import examine as examine
