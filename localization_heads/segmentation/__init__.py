"""From a box and a map to a mask: GrabCut offline, or a SAM, prompted by box, by points and by the map itself."""
