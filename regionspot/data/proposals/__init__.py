"""Boxes from files, in any of four formats."""

from regionspot.data.proposals.arrays import ProposalArrays
from regionspot.data.proposals.file import ProposalFile
from regionspot.data.proposals.selection import select_proposals
from regionspot.data.proposals.writing import FORMATS, write_proposals

__all__ = ["FORMATS", "ProposalArrays", "ProposalFile", "select_proposals", "write_proposals"]
