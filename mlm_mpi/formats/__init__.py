"""Files of other programs: read and written as their authors do, whatever stands in them."""
