"""x"""

from zokern.placement.gathered import Gathered


class GatheredAhead(Gathered):
    pass
