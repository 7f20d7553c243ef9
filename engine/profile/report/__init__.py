"""The report: one page of HTML that says what limits, what evaluations cost and what they bought."""

from rollflow.profile.report.page import html as html
from rollflow.profile.report.page import save as save
