"""Boxes from files, in any of four forms."""

from regionspot.data.proposals.arrays import ProposalArrays
from regionspot.data.proposals.file import ProposalFile
from regionspot.data.proposals.selection import select_proposals
from regionspot.data.proposals.writing import FORMS, write_proposals

__all__ = ["FORMS", "ProposalArrays", "ProposalFile", "select_proposals", "write_proposals"]
