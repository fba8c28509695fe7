"""``report.html``: one self-contained page about a run or several, with interactive plots."""

from eggroll.run.report.answers import CENTER, before_and_after
from eggroll.run.report.page import REPORT, write_comparison, write_report
from eggroll.run.report.view import RESULT

__all__ = ["CENTER", "REPORT", "RESULT", "before_and_after", "write_comparison", "write_report"]
