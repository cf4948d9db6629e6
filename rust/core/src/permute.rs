//! Moving token rows to and from expert order.
