"""A model examined: capture against its own attention, geometry against traced pixels."""
