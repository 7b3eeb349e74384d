"""Reports of audits and verifications."""

from npdrt.conform.report.verdict import *  # noqa: F403
